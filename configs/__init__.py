"""Files that ship with Echelon: cluster and QoS examples, chat templates and the demo model."""
