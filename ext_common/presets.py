"""Presets: what a task wants where the user gave no flag."""

from ext_common.given import given

__all__ = ["given"]
