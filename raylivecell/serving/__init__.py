"""A web service that segments images: Ray Serve behind a REST interface.

1. `api` reads a request: files, options, token; it answers in JSON or in the formats of `predict`.
2. `uploads` decodes a file and segments its planes, with `inference`'s code: the results are those of `predict`.
3. The network runs in a deployment of its own, on a GPU if there is one, with images of equal size in one batch.

settings           limits and options of the service
requests           body and query of a request
answers            cells -> JSON, GeoJSON, COCO, TIFF, PNG, ROIs, CSV
uploads            bytes of a file -> answers, without Ray
page_data          requests of the page: files of corrected cells, scores, growth curves
maps_cache         the network's maps of recent images, for other thresholds
guard              token, host and origin of a request; headers of an answer
api                the REST interface, an ASGI application without Ray
node_metrics       metrics for Prometheus
application        the deployments of Ray Serve
service            the command `serve`
"""
