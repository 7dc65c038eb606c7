package main

import (
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "pagoda/v1"
)

// client is a thin client of pagoda.v1.InferenceService over one connection.
type client struct {
	conn *grpc.ClientConn
	stub pb.InferenceServiceClient
	// token is sent as a bearer token unless empty.
	token string
}

// dial makes a client of the gateway's gRPC address, host:port. It connects at the first call.
func dial(address, token string) (*client, error) {
	conn, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return nil, err
	}
	return &client{conn: conn, stub: pb.NewInferenceServiceClient(conn), token: token}, nil
}

func (c *client) close() error { return c.conn.Close() }

// generate runs one request and hands what comes to take, until the end or until take returns false: then
// the request is cancelled at the server, as it is when ctx ends. A deadline of ctx goes to the server, too.
//
// Errors have a gRPC status; explain reads its details.
func (c *client) generate(ctx context.Context, request *pb.GenerateRequest,
	take func(*pb.GenerateResponse) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // which cancels the call; nothing happens where it has ended
	if c.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
	}
	stream, err := c.stub.Generate(ctx, request)
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if !take(response) {
			return nil
		}
	}
}
