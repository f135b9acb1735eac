"""Frozen, validated specifications, made from ConfigDicts at one boundary."""

from launch.errors import ConfigError, closest
from launch.spec.cluster import Cluster, cluster_spec
from launch.spec.compare import Difference, check_same_run, compare_configs, flatten
from launch.spec.data_fields import free_data_fields
from launch.spec.fields import build, plain, require
from launch.spec.files import LoadedConfig, load_config
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
    "ShardingSpec",
    "SlurmSpec",
    "TrainSpec",
    "WatchPolicy",
    "build",
    "check_same_run",
    "closest",
    "cluster_spec",
    "compare_configs",
    "flatten",
    "free_data_fields",
    "load_config",
    "plain",
    "require",
    "train_spec",
]
