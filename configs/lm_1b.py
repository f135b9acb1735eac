"""A Llama-shaped language model of 1.24 billion parameters, for one slice of TPUs or several.

Command:  muster run --config=configs/lm_1b.py --cluster=configs/cluster/tpu_v5e_256.py \
              --workdir=runs/lm_1b --cluster.tpu.storage=gs://BUCKET/runs \
              --config.data.path="gs://BUCKET/tokens/*.array_record"
Before:   muster plan --config=configs/lm_1b.py --cluster=configs/cluster/tpu_v5e_256.py
Slices:   --config.mesh.dcn_data=2 --config.global_batch_size=1024 on two of them.
"""

from ml_collections import ConfigDict

from configs import llama


def get_config() -> ConfigDict:
    config = llama.training(num_steps=50_000, global_batch_size=512, peak_rate=6e-4)
    # FSDP over one dim of the torus. Over all of it shards would be too small to travel well.
    config.mesh.data = -1  # what the other sizes leave of the devices
    config.mesh.fsdp = 16
    config.model = ConfigDict()
    config.model.vocab_size = 128_256  # Llama 3's
    config.model.dim = 2048
    config.model.num_layers = 16
    config.model.num_heads = 16  # of 128, which splash attention wants
    config.model.num_kv_heads = 8
    config.model.mlp_dim = 8192
    config.model.rope_base = 500_000.0
    config.model.norm_epsilon = 1e-5
    config.model.tied_head = True
    config.model.dtype = "bfloat16"  # of matmuls and activations; params are float32
    config.model.scan_layers = True
    config.model.remat = "keep_all_but_mlp"  # see docs/step.md
    config.model.mlp_chunk = 0  # of the MLP's width computed at a time; 0: all
    config.model.loss_chunk = 4096  # of the vocabulary
    config.model.z_loss = 1e-4
    return config
