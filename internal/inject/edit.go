package inject

import (
	"encoding/json"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// edit replaces a part of a document's text, from one byte offset to another.
type edit struct {
	from, to int
	text     string
}

// apply returns the lines with the edits made, marked; and for each line of the result the number of the line that it is of, or
// stands before, in the document.
func (d *document) apply(edits []edit) (lines []string, origins []int) {
	slices.SortStableFunc(edits, func(a, b edit) int { return a.from - b.from })
	keep := func(from, to int) {
		for i := from; i < to; i++ {
			lines, origins = append(lines, d.lines[i]), append(origins, i)
		}
	}
	done := 0
	for i := 0; i < len(edits); {
		first, last := d.span(edits[i])
		j := i + 1
		for ; j < len(edits); j++ { // edits of the same or of adjoining lines are one
			f, l := d.span(edits[j])
			if f > last {
				break
			}
			last = max(last, l)
		}
		keep(done, first)
		text := d.edited(edits[i:j], d.starts[first], d.starts[last])
		marked := mark(d.lines[first:last], splitLines([]byte(text)), d.lineEnd)
		if first == len(d.lines) && !strings.HasSuffix(d.text, "\n") { // the new last line ends as the old one did
			lines[len(lines)-1] += d.lineEnd
			marked[len(marked)-1] = strings.TrimRight(marked[len(marked)-1], "\r\n")
		}
		for _, line := range marked {
			lines, origins = append(lines, line), append(origins, min(first, len(d.lines)-1))
		}
		done, i = last, j
	}
	keep(done, len(d.lines))
	return lines, origins
}

// span returns the lines that an edit changes: none where it inserts whole lines before one.
func (d *document) span(e edit) (first, last int) {
	first = d.lineOf(e.from)
	if d.isLines(e) {
		if e.from == len(d.text) {
			first = len(d.lines)
		}
		return first, first
	}
	last = d.lineOf(e.to)
	if e.to > d.starts[last] || e.to == e.from {
		last++
	}
	return first, min(last, len(d.lines))
}

// isLines reports whether an edit inserts whole lines before a line, or at the end.
func (d *document) isLines(e edit) bool {
	isAtStart := e.from == d.starts[d.lineOf(e.from)] || e.from == len(d.text)
	return e.from == e.to && isAtStart && strings.HasSuffix(e.text, "\n")
}

// edited returns a part of the text with the edits made.
func (d *document) edited(edits []edit, from, to int) string {
	var b strings.Builder
	for _, e := range edits {
		b.WriteString(d.text[from:e.from])
		if b.Len() > 0 && !strings.HasSuffix(b.String(), "\n") && d.isLines(e) {
			b.WriteString(d.lineEnd)
		}
		b.WriteString(e.text)
		from = e.to
	}
	if to > from {
		b.WriteString(d.text[from:to])
	}
	return b.String()
}

// lineOf returns the line that an offset is in, counted from 0.
func (d *document) lineOf(offset int) int {
	if offset == len(d.text) && !strings.HasSuffix(d.text, "\n") {
		return len(d.lines) - 1
	}
	i, found := slices.BinarySearch(d.starts, offset)
	if !found {
		i--
	}
	return i
}

// offset returns where a node begins.
func (d *document) offset(node *yaml.Node) int {
	line := d.lines[node.Line-1]
	at := 0
	for range node.Column - 1 {
		_, size := utf8.DecodeRuneInString(line[at:])
		at += size
	}
	return d.starts[node.Line-1] + at
}

// isFlow reports whether a node is written in brackets.
func isFlow(node *yaml.Node) bool { return node.Style&yaml.FlowStyle != 0 }

// end returns the offset behind a node. parent is the column of the collection that it is in, counted from 1.
func (d *document) end(node *yaml.Node, parent int) int {
	switch at := d.offset(node); {
	case node.Kind == yaml.AliasNode:
		return at + 1 + len(node.Value)
	case node.Kind == yaml.ScalarNode:
		return d.endOfScalar(node, parent)
	case isFlow(node):
		return d.endOfFlow(at)
	case len(node.Content) == 0:
		return at
	default:
		last := node.Content[len(node.Content)-1]
		if node.Kind == yaml.MappingNode && isAbsent(last) {
			last = node.Content[len(node.Content)-2]
			return d.endOfLine(d.offset(last))
		}
		return d.end(last, d.column(node))
	}
}

// column returns the column of a block collection's keys or dashes, counted from 1. The node's own may be that of an anchor.
func (d *document) column(node *yaml.Node) int {
	if len(node.Content) == 0 || node.Kind != yaml.SequenceNode {
		return slices.Concat(node.Content, []*yaml.Node{node})[0].Column
	}
	item := node.Content[0]
	before := d.text[d.starts[item.Line-1]:d.offset(item)]
	for line := item.Line - 2; !strings.Contains(before, "-") && line >= 0; line-- {
		before, _, _ = strings.Cut(d.lines[line], "#")
	}
	return utf8.RuneCountInString(before[:strings.LastIndex(before, "-")+1])
}

// isAbsent reports whether nothing stands where a value would.
func isAbsent(node *yaml.Node) bool {
	return node.Kind == yaml.ScalarNode && node.Tag == "!!null" && node.Value == "" && node.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) == 0
}

func (d *document) endOfScalar(node *yaml.Node, parent int) int {
	at := d.offset(node)
	line := node.Line - 1
	switch {
	case node.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		return d.starts[endOfText(d.lines, node.Line)]
	case node.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		if i := strings.IndexAny(d.text[at:], `"'`); i >= 0 {
			at += i
		}
		return d.endOfQuoted(at)
	}
	end := at + len(node.Value)
	if strings.HasPrefix(d.text[at:], node.Value) && end <= d.endOfLine(at) {
		return end
	}
	for line+1 < len(d.lines) { // a plain scalar of several lines
		body := strings.TrimSpace(d.lines[line+1])
		depth := len(d.lines[line+1]) - len(strings.TrimLeft(d.lines[line+1], " "))
		if body != "" && (depth < parent || strings.HasPrefix(body, "#")) {
			break
		}
		line++
	}
	return d.endOfLine(d.starts[line])
}

// endOfLine returns the offset of the end of the line that an offset is in, without what ends it.
func (d *document) endOfLine(offset int) int {
	line := d.lineOf(offset)
	return d.starts[line] + len(strings.TrimRight(d.lines[line], "\r\n"))
}

// endOfQuoted returns the offset behind a quoted scalar that begins at one.
func (d *document) endOfQuoted(at int) int {
	quote := d.text[at]
	for i := at + 1; i < len(d.text); i++ {
		switch {
		case quote == '"' && d.text[i] == '\\':
			i++
		case d.text[i] == quote && quote == '\'' && i+1 < len(d.text) && d.text[i+1] == quote:
			i++
		case d.text[i] == quote:
			return i + 1
		}
	}
	return len(d.text)
}

// endOfFlow returns the offset behind a collection in brackets that begins at one, or at its anchor or tag.
func (d *document) endOfFlow(at int) int {
	depth := 0
	for i := at; i < len(d.text); i++ {
		before := byte(' ')
		if i > 0 {
			before = d.text[i-1]
		}
		switch c := d.text[i]; {
		case c == '[' || c == '{':
			depth++
		case c == ']' || c == '}':
			if depth--; depth == 0 {
				return i + 1
			}
		case c == '#' && strings.IndexByte(" \t\n", before) >= 0:
			i = d.endOfLine(i)
		case (c == '"' || c == '\'') && strings.IndexByte(" \t\n[{,:", before) >= 0:
			i = d.endOfQuoted(i) - 1
		}
	}
	return len(d.text)
}

// nextLine returns the offset of the line after the one that an offset is in, or is the start of.
func (d *document) nextLine(offset int) int {
	if offset > 0 && d.text[offset-1] == '\n' && d.starts[d.lineOf(offset)] == offset {
		return offset
	}
	return d.starts[d.lineOf(offset)+1]
}

// aboveComments returns the offset of a line, or of the comments before it that are indented as it is.
func (d *document) aboveComments(offset int) int {
	line := d.lineOf(offset)
	depth := len(d.lines[line]) - len(strings.TrimLeft(d.lines[line], " "))
	for line > 0 {
		above := d.lines[line-1]
		text := strings.TrimLeft(above, " ")
		if len(above)-len(text) != depth || !strings.HasPrefix(text, "#") {
			break
		}
		line--
	}
	return d.starts[line]
}

// indented returns the lines of a text with spaces before each.
func (d *document) indented(text string, spaces int) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		body := strings.TrimRight(line, "\n")
		if body != "" {
			b.WriteString(strings.Repeat(" ", spaces))
		}
		b.WriteString(body + d.lineEnd)
	}
	return b.String()
}

// addItems adds items to a list that is the value of a key, or the key where it is missing. items is a list in block style; it comes
// before the item of a number, or at the end.
func (d *document) addItems(parent *yaml.Node, key, items string, before, place int) []edit {
	k, list := find(parent, key)
	switch {
	case k == nil && isFlow(parent):
		return d.addField(parent, key, items)
	case k == nil:
		column := d.column(parent) - 1
		return []edit{{place, place, d.indented(key+":\n", column) + d.indented(items, column)}}
	case isFlow(parent) && isAbsent(list):
		at := d.offset(k) + len(k.Value)
		return []edit{{at, d.afterColon(at), ": " + flow(items)}}
	case list.Tag == "!!null" || isFlow(list) && len(list.Content) == 0 && !isFlow(parent):
		var edits []edit
		if !isAbsent(list) {
			from := d.offset(list)
			to := d.end(list, k.Column)
			for from > 0 && d.text[from-1] == ' ' {
				from--
			}
			edits = append(edits, edit{from, to, ""})
		}
		at := d.nextLine(d.endOfLine(d.offset(k)))
		return append(edits, edit{at, at, d.indented(items, k.Column-1)})
	case isFlow(list):
		text := strings.TrimSuffix(strings.TrimPrefix(flow(items), "["), "]")
		switch {
		case len(list.Content) == 0:
			at := d.endOfFlow(d.offset(list)) - 1
			return []edit{{at, at, text}}
		case before < len(list.Content):
			at := d.offset(list.Content[before])
			return []edit{{at, at, text + ", "}}
		default:
			at := d.end(list.Content[len(list.Content)-1], 0)
			return []edit{{at, at, ", " + text}}
		}
	}
	var at int
	switch {
	case before == 0:
		at = d.nextLine(d.endOfLine(d.offset(k)))
	case before < len(list.Content):
		at = d.aboveComments(d.dash(list, list.Content[before]))
	default:
		at = d.nextLine(d.end(list, k.Column))
	}
	return []edit{{at, at, d.indented(items, d.column(list)-1)}}
}

// addField adds a key to a mapping in brackets.
func (d *document) addField(mapping *yaml.Node, key, value string) []edit {
	text := key + ": " + flow(value)
	if len(mapping.Content) == 0 {
		at := d.endOfFlow(d.offset(mapping)) - 1
		return []edit{{at, at, text}}
	}
	at := d.offset(mapping.Content[0])
	return []edit{{at, at, text + ", "}}
}

func (d *document) afterColon(at int) int {
	if at < len(d.text) && d.text[at] == ':' {
		return at + 1
	}
	return at
}

// dash returns the offset of the line with the dash of an item.
func (d *document) dash(list, item *yaml.Node) int {
	column := d.column(list)
	for line := item.Line - 1; line > 0; line-- {
		if text := d.lines[line]; len(text) >= column && text[column-1] == '-' && strings.TrimSpace(text[:column-1]) == "" {
			return d.starts[line]
		}
	}
	return d.starts[item.Line-1]
}

// find returns the key and the value of a mapping's field.
func find(mapping *yaml.Node, key string) (k, value *yaml.Node) {
	if mapping == nil || mapping.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i], mapping.Content[i+1]
		}
	}
	return nil, nil
}

// at returns what stands at a path of keys, nil where nothing does.
func at(node *yaml.Node, keys ...string) *yaml.Node {
	for _, key := range keys {
		_, node = find(node, key)
	}
	return node
}

// text returns the value of a scalar at a path of keys, "" where none is.
func text(node *yaml.Node, keys ...string) string {
	if n := at(node, keys...); n != nil && n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
		return n.Value
	}
	return ""
}

// items returns the items of a list at a path of keys.
func items(node *yaml.Node, keys ...string) []*yaml.Node {
	if n := at(node, keys...); n != nil && n.Kind == yaml.SequenceNode {
		return n.Content
	}
	return nil
}

// quoted returns a text as a scalar of YAML, and of JSON.
func quoted(text string) string {
	var b strings.Builder
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(text) // it is a string
	return strings.TrimSuffix(b.String(), "\n")
}

// flow returns a text in block style in brackets, on one line.
func flow(text string) string {
	var node yaml.Node
	if err := yaml.Unmarshal([]byte(text), &node); err != nil {
		panic("a text of inject's own is not YAML: " + err.Error())
	}
	var b strings.Builder
	writeFlow(&b, &node)
	return b.String()
}

func writeFlow(b *strings.Builder, node *yaml.Node) {
	write := func(open, end string, each int) {
		b.WriteString(open)
		for i, n := range node.Content {
			switch {
			case i == 0:
			case i%each == 0:
				b.WriteString(", ")
			default:
				b.WriteString(": ")
			}
			writeFlow(b, n)
		}
		b.WriteString(end)
	}
	switch node.Kind {
	case yaml.DocumentNode:
		writeFlow(b, node.Content[0])
	case yaml.SequenceNode:
		write("[", "]", 1)
	case yaml.MappingNode:
		write("{", "}", 2)
	default:
		if node.Tag == "!!str" {
			b.WriteString(quotedName(node.Value))
		} else {
			b.WriteString(node.Value)
		}
	}
}
