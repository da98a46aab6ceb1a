"""One call of `backward`: from the losses to p.grad."""
