"""The public gRPC door: `pagoda.v1.InferenceService`, health and reflection."""
