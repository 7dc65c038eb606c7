#!/usr/bin/env bash
# What clients/ is built and tested with: compilers, gRPC and protobuf of five languages, from Debian's
# packages. Where some are missing, root gets them installed and others are told. (What TypeScript needs
# beyond Node.js and npm comes from npm, when it is built; of Ruby there is the example in docs/clients.md.)
set -euo pipefail

# A command that may also have come from elsewhere, and the packages that bring it.
declare -A commands=(
  [node]=nodejs [npm]=npm [g++]=g++ [cmake]=cmake [pkg-config]=pkg-config [go]=golang-go [gofmt]=golang-go
  [javac]=default-jdk-headless [ruby]=ruby [protoc]=protobuf-compiler [protoc-gen-go]=protoc-gen-go-1-5
  [protoc-gen-go-grpc]=protoc-gen-go-grpc [grpc_cpp_plugin]=protobuf-compiler-grpc
  [grpc_java_plugin]=protobuf-compiler-grpc-java-plugin
)
# Libraries, each by a file or folder of it. The build looks where Debian puts them. Of Go's protobuf there is
# an older form, too, which knows nothing of what protoc-gen-go makes: it lacks the folder `internal`.
go_root=/usr/share/gocode/src jars=/usr/share/java
declare -A files=(
  [/usr/include/google/protobuf/duration.proto]=libprotobuf-dev
  [/usr/include/grpcpp/grpcpp.h]=libgrpc++-dev
  [$go_root/google.golang.org/grpc/status/status.go]=golang-google-grpc-dev
  [$go_root/google.golang.org/protobuf/proto/proto.go]=golang-google-protobuf-dev
  [$go_root/github.com/golang/protobuf/internal]=golang-github-golang-protobuf-1-5-dev
  [$jars/grpc-netty.jar]=libgrpc-java
  [$jars/protobuf.jar]=libprotobuf-java
  [$jars/guava.jar]=libguava-java
  [$jars/netty-codec-http2.jar]=libnetty-java
  [$jars/perfmark-api.jar]=libperfmark-java
  [$jars/proto-google-common-protos.jar]=libgoogle-common-protos-java
  [$jars/geronimo-annotation-1.3-spec.jar]=libgeronimo-annotation-1.3-spec-java
)

missing=()
for command in "${!commands[@]}"; do
  command -v "$command" >/dev/null || missing+=("${commands[$command]}")
done
for file in "${!files[@]}"; do
  [ -e "$file" ] || missing+=("${files[$file]}")
done
ruby -e 'require "grpc"' 2>/dev/null || missing+=(ruby-grpc)
if [ ${#missing[@]} = 0 ]; then
  exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: the clients in other languages need these; on Debian: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "== installing what the clients in other languages need: ${missing[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
