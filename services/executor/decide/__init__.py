"""The executor's decisions, pure: what an attempt looks like, what follows a failure, which models rest."""
