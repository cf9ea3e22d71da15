"""What is learned about models: quality, output length, when to escalate; online, with uncertainty. Pure numpy."""
