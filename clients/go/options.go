package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	pb "pagoda/v1"
)

const help = `usage: pagoda-client chat [options] [MESSAGE]
       pagoda-client many [options] [MESSAGE]

chat   asks Pagoda and prints the answer as it comes. Without MESSAGE, every line of standard input is a
       turn of one conversation. How each answer ended goes to standard error. Ctrl-C cancels.
many   streams many chats at once over one connection and checks that every one of them finished and that
       no token is missing. MESSAGE gets the chat's number at its end.

options
  --url HOST:PORT       gRPC address of the gateway [PAGODA_URL, else 127.0.0.1:8001]
  --model NAME          model to ask [the one that is served]
  --system TEXT         what the model is told before the conversation
  --temperature T       0 always takes the likeliest token [1]
  --max-tokens N        the most tokens of an answer [as many as fit]
  --seed N              the same seed draws the same tokens; chat i of many draws with N + i
  --ignore-eos          let no answer end before --max-tokens
  --deadline SECONDS    fail an answer that takes longer with DEADLINE_EXCEEDED; the server stops it
  --leave-after N       leave an answer after N messages: the call is cancelled, the server stops it
  --chats N             how many chats at once (many) [100]
  --help                this text

PAGODA_TOKEN is sent as a bearer token. The exit status is 1 when a call fails or a chat of many does not
finish, 2 when the command line is wrong.

  pagoda-client chat 'What is the capital of France?'
  pagoda-client chat --deadline 5 --max-tokens 64 'Tell me a story.'
  pagoda-client many --chats 200 --max-tokens 32 --ignore-eos
`

type options struct {
	command    string
	url        string
	token      string
	model      string
	system     string
	sampling   *pb.SamplingParams
	deadline   float64 // seconds; 0 is none
	leaveAfter uint    // messages; 0 is never
	chats      uint
	message    *string // nil is none
}

// parse reads the arguments. The error is flag.ErrHelp when --help was asked for.
func parse(args []string) (*options, error) {
	o := &options{url: os.Getenv("PAGODA_URL"), token: os.Getenv("PAGODA_TOKEN"), sampling: &pb.SamplingParams{}}
	if o.url == "" {
		o.url = "127.0.0.1:8001"
	}
	flags := flag.NewFlagSet("pagoda-client", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // main prints errors and the help
	flags.StringVar(&o.url, "url", o.url, "")
	flags.StringVar(&o.model, "model", "", "")
	flags.StringVar(&o.system, "system", "", "")
	flags.Float64Var(&o.deadline, "deadline", 0, "")
	flags.UintVar(&o.leaveAfter, "leave-after", 0, "")
	flags.UintVar(&o.chats, "chats", 100, "")
	// Of the sampling, only what is given is sent: 0 is a temperature, too.
	flags.Func("temperature", "", func(given string) error {
		value, err := strconv.ParseFloat(given, 32)
		temperature := float32(value)
		o.sampling.Temperature = &temperature
		return err
	})
	flags.Func("max-tokens", "", func(given string) error {
		value, err := strconv.ParseUint(given, 10, 32)
		maxTokens := uint32(value)
		o.sampling.MaxTokens = &maxTokens
		return err
	})
	flags.Func("seed", "", func(given string) error {
		seed, err := strconv.ParseUint(given, 10, 64)
		o.sampling.Seed = &seed
		return err
	})
	ignoreEos := flags.Bool("ignore-eos", false, "")

	// Options may stand before and after the words, as in the other clients.
	var words []string
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if flags.NArg() == 0 {
			break
		}
		words, args = append(words, flags.Arg(0)), flags.Args()[1:]
	}
	o.sampling.IgnoreEos = ignoreEos
	if len(words) == 0 || (words[0] != "chat" && words[0] != "many") {
		return nil, errors.New("the first word must be chat or many")
	}
	if len(words) > 2 {
		return nil, fmt.Errorf("one MESSAGE, please, in quotes: %s is too much", strings.Join(words[2:], " "))
	}
	o.command = words[0]
	if len(words) == 2 {
		o.message = &words[1]
	}
	return o, nil
}
