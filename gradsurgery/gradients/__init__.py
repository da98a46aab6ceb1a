"""The task gradients G: where they lie in memory, and how M and Gᵀw are taken of them."""
