from shared import one_thread  # noqa: F401 before anything imports NumPy
