"""What a retriever is trained towards: the objectives that share data, pools and driver."""

from dream_training.objectives.distillation import EmdrLoss, ReplugLoss
from dream_training.objectives.infonce import PoolInfoNCELoss
from dream_training.objectives.revela import RevelaLoss

__all__ = ["EmdrLoss", "PoolInfoNCELoss", "ReplugLoss", "RevelaLoss"]
