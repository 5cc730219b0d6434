"""What a run is: every setting, its default, its meaning and its limits, settled before anything is built."""

from bdh_mlflow.config.config import (
    CLASHES,
    BDHConfig,
    Check,
    Clash,
    Config,
    Difference,
    changes_trajectory,
)
from bdh_mlflow.config.messages import Problem, documentation
from bdh_mlflow.config.settings import (
    SECTIONS,
    DataLoaderConfig,
    DatasetConfig,
    Fp8Config,
    LowPrecisionConfig,
    ModelConfig,
    SchedulerConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "CLASHES",
    "SECTIONS",
    "BDHConfig",
    "Check",
    "Clash",
    "Config",
    "DataLoaderConfig",
    "DatasetConfig",
    "Difference",
    "Fp8Config",
    "LowPrecisionConfig",
    "ModelConfig",
    "Problem",
    "SchedulerConfig",
    "TrackingConfig",
    "TrainingConfig",
    "changes_trajectory",
    "documentation",
]
