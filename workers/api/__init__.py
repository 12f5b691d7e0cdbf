"""What both sides of the wire know: requests, configs, errors, frames. Never imports torch."""
