// A conversation with Pagoda, or many at once; --help explains.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pb "pagoda/v1"
)

// answer is what came of one chat.
type answer struct {
	text         strings.Builder
	requestID    string
	numMessages  uint
	numTokens    int
	finishReason pb.FinishReason
	// usage is nil when the answer was left before its end.
	usage *pb.Usage
}

// ask streams the answer to a conversation and hands each piece of text to print as it comes.
func ask(ctx context.Context, c *client, o *options, sampling *pb.SamplingParams, messages []*pb.ChatMessage,
	print func(string)) (*answer, error) {
	if o.deadline != 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(o.deadline*float64(time.Second)))
		defer cancel()
	}
	request := &pb.GenerateRequest{
		Model:    o.model,
		Prompt:   &pb.GenerateRequest_Chat{Chat: &pb.Chat{Messages: messages}},
		Sampling: sampling,
	}
	a := &answer{}
	err := c.generate(ctx, request, func(response *pb.GenerateResponse) bool {
		a.numMessages++
		if response.GetRequestId() != "" {
			a.requestID = response.GetRequestId()
		}
		a.text.WriteString(response.GetText())
		a.numTokens += len(response.GetTokenIds())
		print(response.GetText())
		if reason := response.GetFinishReason(); reason != pb.FinishReason_FINISH_REASON_UNSPECIFIED {
			a.finishReason = reason
		}
		a.usage = response.GetUsage()
		return a.usage != nil || a.numMessages != o.leaveAfter // false cancels the call
	})
	return a, err
}

func (a *answer) reason() string {
	return strings.ToLower(strings.TrimPrefix(a.finishReason.String(), "FINISH_REASON_"))
}

// flaw says why an answer is not whole; empty when it is.
func (a *answer) flaw() string {
	whole := a.finishReason == pb.FinishReason_FINISH_REASON_STOP ||
		a.finishReason == pb.FinishReason_FINISH_REASON_LENGTH
	switch {
	case a.usage == nil:
		return "ended by leaving"
	case !whole:
		return "ended by " + a.reason()
	case a.numTokens != int(a.usage.GetCompletionTokens()):
		return fmt.Sprintf("%d of %d tokens came", a.numTokens, a.usage.GetCompletionTokens())
	}
	return ""
}

func opening(o *options) []*pb.ChatMessage {
	if o.system == "" {
		return nil
	}
	return []*pb.ChatMessage{{Role: "system", Content: o.system}}
}

// chat asks one turn after the other: the message, or every line of standard input.
func chat(ctx context.Context, c *client, o *options) error {
	messages := opening(o)
	turn := func(said string) error {
		messages = append(messages, &pb.ChatMessage{Role: "user", Content: said})
		a, err := ask(ctx, c, o, o.sampling, messages, func(text string) { fmt.Print(text) })
		fmt.Println()
		if err != nil {
			return err
		}
		messages = append(messages, &pb.ChatMessage{Role: "assistant", Content: a.text.String()})
		end := fmt.Sprintf("left after %d messages", a.numMessages)
		if a.usage != nil {
			end = fmt.Sprintf("%d messages, %d tokens, %s", a.numMessages, a.usage.GetCompletionTokens(), a.reason())
		}
		fmt.Fprintf(os.Stderr, "[%s: %s]\n", a.requestID, end)
		return nil
	}
	if o.message != nil {
		return turn(*o.message)
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := turn(lines.Text()); err != nil {
			return err
		}
	}
	return lines.Err()
}

// many streams o.chats chats at once. It says how many finished and returns whether all did.
func many(ctx context.Context, c *client, o *options) bool {
	about := "Tell me something about the number"
	if o.message != nil {
		about = *o.message
	}
	started := time.Now()
	flaws, counts := make([]string, o.chats), make([]int, o.chats)
	var all sync.WaitGroup
	for i := uint(0); i < o.chats; i++ {
		all.Add(1)
		go func(i uint) {
			defer all.Done()
			messages := append(opening(o), &pb.ChatMessage{Role: "user", Content: fmt.Sprintf("%s %d", about, i)})
			sampling := proto.Clone(o.sampling).(*pb.SamplingParams)
			if sampling.Seed != nil {
				*sampling.Seed += uint64(i)
			}
			a, err := ask(ctx, c, o, sampling, messages, func(string) {})
			if err != nil {
				flaws[i] = explain(err).String()
			} else {
				flaws[i], counts[i] = a.flaw(), a.numTokens
			}
		}(i)
	}
	all.Wait()
	finished, numTokens := uint(0), 0
	for i, flaw := range flaws {
		numTokens += counts[i]
		if flaw == "" {
			finished++
		} else {
			fmt.Fprintf(os.Stderr, "chat %d: %s\n", i, flaw)
		}
	}
	fmt.Printf("%d of %d chats finished, %d tokens in %.1f s\n",
		finished, o.chats, numTokens, time.Since(started).Seconds())
	return finished == o.chats
}

func run() int {
	o, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Print(help)
		return 0
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\ntry --help\n", err)
		return 2
	}
	c, err := dial(o.url, o.token)
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %s: %v\n", o.url, err)
		return 1
	}
	defer c.close()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if o.command == "many" {
		if !many(ctx, c, o) {
			return 1
		}
		return 0
	}
	if err := chat(ctx, c, o); err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", explain(err))
		return 1
	}
	return 0
}

func main() { os.Exit(run()) }
