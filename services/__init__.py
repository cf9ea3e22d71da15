"""The services. `shared` comes first: it settles what libraries are to be told before they are imported."""

import shared  # noqa: F401
