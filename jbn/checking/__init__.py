"""A self-test of this library on the devices at hand."""
