// Package nft keeps the kernel's table inet mantlet. It touches nothing else in the kernel, and every change is one
// transaction: packets meet the rules from before it or those from after it.
package nft
