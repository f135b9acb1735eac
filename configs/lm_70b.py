"""A language model of Llama 3.1 70B's shape (70.6 billion parameters), for TPU slices.

Command:  muster run --config=configs/lm_70b.py --cluster=configs/cluster/tpu_v5p_128.py \
              --workdir=runs/lm_70b --cluster.tpu.storage=gs://BUCKET/runs \
              --config.data.path="gs://BUCKET/tokens/*.array_record"
Before:   muster plan --config=configs/lm_70b.py --cluster=configs/cluster/tpu_v5p_128.py
Slices:   --config.mesh.dcn_data=2 --config.global_batch_size=512 on two of them.
"""

from ml_collections import ConfigDict

from configs import llama


def get_config() -> ConfigDict:
    config = llama.training(num_steps=100_000, global_batch_size=256, peak_rate=1.5e-4)
    config.model = ConfigDict()
    config.model.vocab_size = 128_256
    config.model.dim = 8192
    config.model.num_layers = 80
    config.model.num_heads = 64
    config.model.num_kv_heads = 8
    config.model.mlp_dim = 28_672
    config.model.rope_base = 500_000.0
    config.model.norm_epsilon = 1e-5
    config.model.tied_head = False
    config.model.dtype = "bfloat16"  # of matmuls and activations; params are float32
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.mlp_chunk = 1024  # of the MLP's width computed at a time; 0: all
    config.model.loss_chunk = 4096  # of the vocabulary
    config.model.z_loss = 0.0
    return config
