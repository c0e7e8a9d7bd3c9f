"""What a serving file becomes elsewhere: manifests as plain data, dumped as YAML."""
