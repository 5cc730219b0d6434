"""The BDH network under its published import path: `from bdh_mlflow.model import BDH, BDHConfig`."""

from bdh_mlflow.config import BDHConfig
from bdh_mlflow.model.bdh import BDH

__all__ = ["BDH", "BDHConfig"]
