"""Everything that shows that the promises hold. Nothing in production imports it."""
