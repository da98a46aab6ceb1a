"""What surgery needs of torch.distributed; no other package knows a process group."""
