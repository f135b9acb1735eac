"""Packed, filtered and mixed documents."""

from __future__ import annotations

from ml_collections import ConfigDict

from tests.testing.configs import tiny

SEQ_LEN = 15


def get_config() -> ConfigDict:
    """Needs `--config.data.mixture.NAME.path`."""
    config = tiny.get_config("witness")
    config.task = "tests.testing.elastic:ElasticWitness"
    config.num_steps = 3
    config.data = ConfigDict({"kind": "array_record", "seq_len": SEQ_LEN, "packing": True})
    config.data.mixture = ConfigDict()
    config.data.mixture.web = ConfigDict({"path": "", "weight": 0.7})
    config.data.mixture.web.keep = "tests.testing.elastic:is_kept"
    config.data.mixture.books = ConfigDict({"path": "", "weight": 0.3})
    return config
