"""Frozen, validated specifications, made from ConfigDicts at one boundary."""

from launch.spec.errors import ConfigError, closest
from launch.spec.fields import build, plain, require
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

__all__ = [
    "AXES",
    "BATCH_AXES",
    "CheckpointSpec",
    "ConfigError",
    "EvalSpec",
    "MeshSpec",
    "ShardingSpec",
    "TrainSpec",
    "build",
    "closest",
    "plain",
    "require",
    "train_spec",
]
