// Package nft keeps the kernel's table inet mantlet. It touches nothing else in the kernel, and every change takes effect by one
// transaction: packets meet the rules from before it or those from after it. Where connections are open, one before it makes what they use,
// and one after it deletes what they do not use any more.
package nft
