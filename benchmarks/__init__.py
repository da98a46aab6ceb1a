"""What surgery costs, measured so that anyone can repeat it: measure -> rows in a file -> pages."""
