"""Names under which the parts of a cluster find each other in Ray."""

NAMESPACE = "echelon"
DISPATCHER = "dispatcher"  # the dispatcher's actor
GATEWAY = "gateway"  # the actor behind `echelon.connect`
REPLICAS_APP = "replicas"  # Serve application of the engines
FRONT_APP = "front"  # Serve application of the ingress
