"""The shipped dispatcher, policy and engine scheduler under a virtual clock; only the device is a model of costs."""
