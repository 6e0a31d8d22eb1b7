"""The schema of a run's YAML, one file per section. `core/config_files.py` reads and writes the YAML."""

from mmdora.core.config.data import DataConfig, SourceConfig, VideoConfig
from mmdora.core.config.evaluation import EvaluationConfig, JudgeConfig
from mmdora.core.config.model import LanguageModelConfig, ModelConfig, VisionEncoderConfig
from mmdora.core.config.part import PartConfig
from mmdora.core.config.run import RunConfig
from mmdora.core.config.section import Section
from mmdora.core.config.training import TrainingConfig

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "LanguageModelConfig",
    "ModelConfig",
    "PartConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "TrainingConfig",
    "VideoConfig",
    "VisionEncoderConfig",
]
