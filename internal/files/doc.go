// Package files is for files that the host may back: a volume's file system can hang, and whoever reads it must not.
package files
