"""Random calls of every route, drawn from the server's own OpenAPI document. None may fail with 5xx."""
