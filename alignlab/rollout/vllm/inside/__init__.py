"""Code that runs inside vLLM's processes, loaded by its plug-in entry points.

    plugin, model          our own model shapes
    transfer, worker       weight updates
    patches                corrections of vLLM's faults, each with its reason
    routing                recorder of the experts that vLLM chooses on a CPU
    endpoints, uploads     HTTP endpoints beside vLLM's own, and checks of what they receive
    token_guard            middleware that requires the token
    asgi, connections      limits of size and time for requests

Nothing here imports the trainer's side: a test lists what may be imported.
"""
