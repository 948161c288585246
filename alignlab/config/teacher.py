"""Which model a student learns from."""

from __future__ import annotations

from alignlab.config.base import Frozen
from alignlab.config.model import Dtype
from alignlab.config.on_resume import OnResume, Recorded


class TeacherSettings(Frozen):
    """A frozen model that says how likely it finds each token."""

    on_resume = OnResume.REFUSED
    name: Recorded[str]
    """A Hub id, a local folder (of a model or an adapter), or a model that a Python package ships."""
    dtype: Dtype = "auto"
    """Of its weights; auto: bfloat16 on a GPU, float32 on a CPU."""
