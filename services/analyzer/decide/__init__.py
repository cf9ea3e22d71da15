"""Pure decisions of the analyzer: what a query is about, and what is wrong with the fleet."""
