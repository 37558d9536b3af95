"""The training client's service over HTTP: `app.create_app` makes it of an engine, `server.serve` runs it."""
