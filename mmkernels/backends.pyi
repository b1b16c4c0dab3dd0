class BackendError(RuntimeError):
    """A backend that was asked for by name can't run these arguments."""
