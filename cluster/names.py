"""Names under which the parts of a cluster find each other in Ray, and the port where others find it."""

NAMESPACE = "echelon"
DISPATCHER = "dispatcher"  # the dispatcher's actor
GATEWAY = "gateway"  # the actor behind `echelon.connect`
REPLICAS = "replicas-"  # how the Serve application of a model's engines begins
PORT = 23333  # of the HTTP API
FRONT_APP = "front"  # Serve application of the ingress


def replicas_app(model: str) -> str:
    """The Serve application of the engines of `model`."""
    return REPLICAS + model
