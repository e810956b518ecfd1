//go:build tools

// Package tools names CoreDNS, so that go.mod keeps what it needs.
package tools

import _ "github.com/coredns/coredns"
