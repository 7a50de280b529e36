package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// What inject adds to a text stands between two comments. The lines that it takes the place of stand behind the first one, each
// as a comment, so that the text itself says how to undo it:
//
//	# >>> mantlet inject, in place of 1 line >>>
//	#|          httpGet: {path: /healthz, port: 8080}
//	            httpGet: {path: /probe/web, port: 9901}
//	# <<< mantlet inject <<<
const (
	beginMark    = "# >>> mantlet inject >>>"
	endMark      = "# <<< mantlet inject <<<"
	originalMark = "#|"
)

var beginInPlace = regexp.MustCompile(`^# >>> mantlet inject, in place of ([0-9]+) lines? >>>$`)

// began returns whether a line is the first of what inject added, and how many originals follow it.
func began(line string) (originals int, ok bool) {
	text := strings.TrimSpace(line)
	if text == beginMark {
		return 0, true
	}
	match := beginInPlace.FindStringSubmatch(text)
	if match == nil {
		return 0, false
	}
	originals, err := strconv.Atoi(match[1])
	return originals, err == nil
}

// mark returns the lines that go in the place of the originals: the new ones between marks. All lines end as lines do, but for the
// last one of a file, which may not.
func mark(originals, lines []string, lineEnd string) []string {
	indent := ""
	if len(lines) > 0 {
		indent = lines[0][:len(lines[0])-len(strings.TrimLeft(lines[0], " "))]
	}
	begin := beginMark
	switch len(originals) {
	case 0:
	case 1:
		begin = "# >>> mantlet inject, in place of 1 line >>>"
	default:
		begin = fmt.Sprintf("# >>> mantlet inject, in place of %d lines >>>", len(originals))
	}
	marked := []string{indent + begin + lineEnd}
	last := lineEnd
	for _, line := range originals {
		body := strings.TrimRight(line, "\r\n")
		last = line[len(body):]
		end := last
		if end == "" {
			end = lineEnd
		}
		marked = append(marked, indent+originalMark+body+end)
	}
	for _, line := range lines {
		if strings.TrimRight(line, "\r\n") == line {
			line += lineEnd
		}
		marked = append(marked, line)
	}
	return append(marked, indent+endMark+last)
}

// unmark returns the lines as they were before inject, given the document that they are. Marks in a text of the document, for example
// of an annotation, are not marks. The error says that marks were damaged, and in which line.
func unmark(lines []string, root *yaml.Node) ([]string, error) {
	inText := texts(lines, root)
	var all []string
	for i := 0; i < len(lines); i++ {
		count, isBegin := began(lines[i])
		isEnd := strings.TrimSpace(lines[i]) == endMark
		if inText[i] || !isBegin && !isEnd {
			all = append(all, lines[i])
			continue
		}
		start := i
		if isEnd {
			return nil, damaged{i + 1, "an end without a beginning"}
		}
		var originals []string
		for range count {
			if i++; i >= len(lines) || !strings.HasPrefix(strings.TrimLeft(lines[i], " "), originalMark) {
				return nil, damaged{start + 1, "not all of the replaced lines are there"}
			}
			originals = append(originals, strings.TrimPrefix(strings.TrimLeft(lines[i], " "), originalMark))
		}
		for i++; i < len(lines) && strings.TrimSpace(lines[i]) != endMark; i++ {
			if _, again := began(lines[i]); again {
				return nil, damaged{start + 1, "no end"}
			}
		}
		if i >= len(lines) {
			return nil, damaged{start + 1, "no end"}
		}
		all = append(all, originals...)
		end := lines[i][len(strings.TrimRight(lines[i], "\r\n")):]
		if len(all) > 0 && (count > 0 || end == "") { // the last line ends as it does in the text
			all[len(all)-1] = strings.TrimRight(all[len(all)-1], "\r\n") + end
		}
	}
	return all, nil
}

// damaged are marks that do not say how to undo what they mark.
type damaged struct {
	line int
	what string
}

func (d damaged) Error() string {
	return fmt.Sprintf("the comments that mark what mantlet inject added are damaged (%s); restore them, or take the manifest as it was before", d.what)
}

// texts returns which lines are of block scalars.
func texts(lines []string, root *yaml.Node) []bool {
	in := make([]bool, len(lines))
	walk(root, func(node *yaml.Node) {
		if node.Kind != yaml.ScalarNode || node.Style&(yaml.LiteralStyle|yaml.FoldedStyle) == 0 {
			return
		}
		for i := node.Line; i < endOfText(lines, node.Line); i++ { // the line after the node's, counted from 0
			in[i] = true
		}
	})
	return in
}

func walk(node *yaml.Node, visit func(*yaml.Node)) {
	visit(node)
	for _, n := range node.Content {
		walk(n, visit)
	}
}

// endOfText returns the number of lines up to the end of a block scalar, of which the first start before it.
func endOfText(lines []string, start int) int {
	indent, end := givenIndent(lines[start-1]), start
	keep := strings.Contains(header(lines[start-1]), "+")
	for i := start; i < len(lines); i++ {
		body := strings.TrimRight(lines[i], " \r\n")
		if body == "" {
			if keep {
				end = i + 1
			}
			continue
		}
		depth := len(body) - len(strings.TrimLeft(body, " "))
		if indent < 0 {
			indent = depth
		}
		if depth < indent {
			break
		}
		end = i + 1
	}
	return end
}

// givenIndent returns how far a block scalar is indented if the line of its indicators says so, else -1.
func givenIndent(line string) int {
	digit := strings.IndexAny(header(line), "123456789")
	if digit < 0 {
		return -1
	}
	key := strings.TrimLeft(line, " -")
	outer := len(line) - len(key)
	if strings.IndexAny(key, "|>") == 0 { // the item of a list itself
		outer = strings.LastIndex(line[:outer], "-")
	}
	return outer + int(header(line)[digit]-'0')
}

// header returns the indicators of a block scalar at the end of a line, as "|+".
func header(line string) string {
	line, _, _ = strings.Cut(line, " #")
	fields := strings.Fields(line)
	if len(fields) == 0 {
		return ""
	}
	return fields[len(fields)-1]
}

// splitLines returns the lines of a text, each with its end.
func splitLines(text []byte) []string {
	lines := strings.SplitAfter(string(text), "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// errJSON is of a document that has no place for comments.
var errJSON = errors.New("is JSON, which has no comments to mark what is added; convert it to YAML first, for example with kubectl create --dry-run=client -o yaml -f FILE")

// isJSON reports whether a document is written as JSON.
func (d *document) isJSON() bool { return json.Valid([]byte(strings.TrimPrefix(d.text, "---"))) }
