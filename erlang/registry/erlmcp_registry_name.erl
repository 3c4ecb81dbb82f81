%% Validation and normalisation of the names of tools and transports.
%%
%% A name is UTF-8 text. Lengths are counted in what a reader calls characters (extended grapheme
%% clusters, Unicode Annex #29), so a family emoji or a letter with its accents counts once.
%%
%% Guarantee: no function here ever makes an atom. Atoms are not garbage-collected, so a name that came from
%% the network must not become one; normalize_name/1 returns an atom only if it exists already.
%%
%% Trade-off: the result of normalize_name/1 depends on which modules are loaded. Compare
%% two results only within the life of one node.
-module(erlmcp_registry_name).

-export([validate_tool_name/1, validate_transport_name/1, normalize_name/1]).
-export_type([name_error/0]).

%% The maximum length of an atom, and therefore of a name.
-define(MAX_CHARACTERS, 255).

-type name_error() :: empty | too_long | invalid_characters | invalid_binary.


%% @doc Checks the name of a tool.
%%
%% Letters and digits of any script, `_', `-', `.', `/', `:', `@', the space and emoji are valid. The first fault
%% found is returned: `invalid_binary' for anything but a binary, `empty', `too_long' above 255 characters, and
%% `invalid_characters' for any other character (including control characters) and for binaries that are not UTF-8.
-spec validate_tool_name(term()) -> ok | {error, name_error()}.
validate_tool_name(Name) ->
    validate(Name).


%% @doc Checks the name of a transport. The rules are those of {@link validate_tool_name/1}.
-spec validate_transport_name(term()) -> ok | {error, name_error()}.
validate_transport_name(Name) ->
    validate(Name).


%% @doc Returns the atom of this name if it exists, otherwise the name as an NFC binary.
%%
%% Names that differ only in their composition (é as one code point or as two) have the same result.
%% An atom is returned as it is, and a string is treated as its binary. Raises `badarg' for anything
%% that is not UTF-8 text.
-spec normalize_name(binary() | string() | atom()) -> atom() | binary().
normalize_name(Name) when is_atom(Name) ->
    Name;
normalize_name(Name) when is_binary(Name); is_list(Name) ->
    case unicode:characters_to_nfc_binary(Name) of
        Normal when is_binary(Normal) -> existing_atom(Normal);
        {error, _, _} -> error(badarg, [Name])
    end;
normalize_name(Name) ->
    error(badarg, [Name]).


-spec validate(term()) -> ok | {error, name_error()}.
validate(<<>>) ->
    {error, empty};
validate(Name) when is_binary(Name) ->
    try string:length(Name) of
        Length when Length > ?MAX_CHARACTERS -> {error, too_long};
        _ -> validate_characters(Name)
    catch
        error:_ -> {error, invalid_characters}
    end;
validate(_) ->
    {error, invalid_binary}.


%% Letters (L) with their marks (M), decimal digits (Nd), separators of the parts of names, and the parts of emoji:
%% symbols (So), skin tones (Sk), the joiner, and the tags that make flags of regions.
-define(CHARACTERS, <<"^(?:[\\p{L}\\p{M}\\p{Nd}\\p{So}_\\-./:@ ]|[\\x{1F3FB}-\\x{1F3FF}]|\\x{200D}"
                      "|[\\x{1F000}-\\x{1FAFF}]|[\\x{E0020}-\\x{E007F}])+$">>).


%% The name is valid UTF-8 here: string:length/1 has accepted it.
-spec validate_characters(binary()) -> ok | {error, invalid_characters}.
validate_characters(Name) ->
    case re:run(Name, ?CHARACTERS, [unicode, dollar_endonly, {capture, none}]) of
        match -> ok;
        nomatch -> {error, invalid_characters}
    end.


-spec existing_atom(binary()) -> atom() | binary().
existing_atom(Name) ->
    try
        binary_to_existing_atom(Name, utf8)
    catch
        error:_ -> Name
    end.
