"""The signal that one document can't be used: it is left out and counted (``documents.py``)."""

from nemoquant.errors import CalibrationError


class DocumentError(CalibrationError):
    """Why a document can't be used. It does not leave this room."""
