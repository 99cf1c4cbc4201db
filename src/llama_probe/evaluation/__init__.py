"""What a head is worth, and what it looked at."""
