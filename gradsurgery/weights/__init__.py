"""From the Gram matrix to the task weights: when to solve, for which parts, in which geometry."""
