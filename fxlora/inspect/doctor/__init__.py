"""`doctor`: what is wrong with a model that shall be trained, or was, where, why, and what to do about it."""

from __future__ import annotations

from fxlora.inspect.doctor.examine import doctor
from fxlora.inspect.doctor.report import DoctorReport, Finding, Memory

__all__ = ["DoctorReport", "Finding", "Memory", "doctor"]
