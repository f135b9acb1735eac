"""Frozen, validated specifications, made from ConfigDicts at one boundary."""

from launch.errors import ConfigError, closest
from launch.spec.cluster import Cluster, cluster_spec
from launch.spec.compare import (
    Difference,
    compare_code,
    compare_configs,
    compare_versions,
    flatten,
)
from launch.spec.data_fields import free_data_fields
from launch.spec.fields import build, plain, require
from launch.spec.files import LoadedConfig, add_override, load_config
from launch.spec.job import (
    AXES,
    BATCH_AXES,
    CheckpointSpec,
    EvalSpec,
    MeshSpec,
    ShardingSpec,
    TrainSpec,
    train_spec,
)
from launch.spec.policies import RestartPolicy, WatchPolicy
from launch.spec.restore import RestoreSpec
from launch.spec.slurm import SlurmSpec

__all__ = [
    "AXES",
    "BATCH_AXES",
    "CheckpointSpec",
    "Cluster",
    "ConfigError",
    "Difference",
    "EvalSpec",
    "LoadedConfig",
    "MeshSpec",
    "RestartPolicy",
    "RestoreSpec",
    "ShardingSpec",
    "SlurmSpec",
    "TrainSpec",
    "WatchPolicy",
    "add_override",
    "build",
    "closest",
    "cluster_spec",
    "compare_code",
    "compare_configs",
    "compare_versions",
    "flatten",
    "free_data_fields",
    "load_config",
    "plain",
    "require",
    "train_spec",
]
