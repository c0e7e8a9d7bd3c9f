"""The inference runtime: settings, the decoder as data, the engine, the cluster, the driver and its server."""
