"""What to run and how: the frozen configuration tree, and the pure functions that derive it and say why."""
