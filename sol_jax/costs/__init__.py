"""What things cost in bytes and operations: a decode step (`decode_step`) and an update (`update`)."""
