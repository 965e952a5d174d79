"""What shows that the promises hold; nothing in production imports it."""
