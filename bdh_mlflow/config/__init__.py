"""What a run is: every setting, its default, its meaning and its limits, settled before anything is built."""

from bdh_mlflow.config.config import (
    INCOMPATIBLE,
    BDHConfig,
    Check,
    Config,
    Difference,
    Incompatibility,
    changes_trajectory,
    in_full,
    incompatible,
    problem_of,
)
from bdh_mlflow.config.messages import Problem, documentation
from bdh_mlflow.config.resolve import Machine, Resolved, resolve
from bdh_mlflow.config.settings import (
    SECTIONS,
    DataLoaderConfig,
    DatasetConfig,
    Fp8Config,
    LowPrecisionConfig,
    ModelConfig,
    Role,
    SchedulerConfig,
    TrackingConfig,
    TrainingConfig,
    role_of,
)

__all__ = [
    "INCOMPATIBLE",
    "SECTIONS",
    "BDHConfig",
    "Check",
    "Config",
    "DataLoaderConfig",
    "DatasetConfig",
    "Difference",
    "Fp8Config",
    "Incompatibility",
    "LowPrecisionConfig",
    "Machine",
    "ModelConfig",
    "Problem",
    "Resolved",
    "Role",
    "SchedulerConfig",
    "TrackingConfig",
    "TrainingConfig",
    "changes_trajectory",
    "documentation",
    "in_full",
    "incompatible",
    "problem_of",
    "resolve",
    "role_of",
]
