/*
 * text_format.cpp
 *		The settings that texts depend on, and the values that they have while texts
 *		are made and read for peers.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

/* A setting, what it is while it counts, and whether it is that already. */
struct Pinned
{
	Settings part_of;
	const char *name;
	const char *value;
	bool (*holds)();
};

constexpr const char *kPath = "pg_catalog, pg_temp";

/* Zones of another name may be the same one; whoever has one of these has it for sure. */
static bool
IsUtc()
{
	const char *zone = pg_get_timezone_name(session_timezone);

	return zone != NULL && (strcmp(zone, "UTC") == 0 || strcmp(zone, "Etc/UTC") == 0);
}

/* Asked by name: the header that declares the variables wants another library's (ICU). */
static bool
IsC(const char *setting)
{
	const char *locale = GetConfigOption(setting, false, false);

	return strcmp(locale, "C") == 0 || strcmp(locale, "POSIX") == 0;
}

static bool
IsSimpleConfig()
{
	return strcmp(TSCurrentConfig, "pg_catalog.simple") == 0;
}

/* Most values are the defaults. */
static constexpr Pinned pinned[] = {
	{kDateStyle, "DateStyle", "ISO", [] { return DateStyle == USE_ISO_DATES; }},
	{kIntervalStyle, "IntervalStyle", "postgres",
	 [] { return IntervalStyle == INTSTYLE_POSTGRES; }},
	{kTimeZone, "TimeZone", "UTC", IsUtc},
	{kFloatDigits, "extra_float_digits", "3", [] { return extra_float_digits > 0; }},
	{kByteaOutput, "bytea_output", "hex", [] { return bytea_output == BYTEA_OUTPUT_HEX; }},
	{kArrayNulls, "array_nulls", "on", [] { return Array_nulls; }},
	{kMonetary, "lc_monetary", "C", [] { return IsC("lc_monetary"); }},
	{kXmlOption, "xmloption", "content", [] { return xmloption == XMLOPTION_CONTENT; }},
	{kNames, "search_path", kPath, [] { return strcmp(namespace_search_path, kPath) == 0; }},
	{kNames, "quote_all_identifiers", "off", [] { return !quote_all_identifiers; }},
	{kExpressions, "DateStyle", "MDY", [] { return DateOrder == DATEORDER_MDY; }},
	{kExpressions, "lc_numeric", "C", [] { return IsC("lc_numeric"); }},
	{kExpressions, "lc_time", "C", [] { return IsC("lc_time"); }},
	{kExpressions, "default_text_search_config", "pg_catalog.simple", IsSimpleConfig},
	{kExpressions, "standard_conforming_strings", "on", [] { return standard_conforming_strings; }},
};

/* ---- types ---- */

/* Of a built-in type that is made of no others; those of user types may depend on anything. */
static Settings
SettingsOfBase(Oid type)
{
	switch (type)
	{
		case BOOLOID:
		case CHAROID:
		case NAMEOID:
		case INT2OID:
		case INT4OID:
		case INT8OID:
		case INT2VECTOROID:
		case NUMERICOID:
		case OIDOID:
		case OIDVECTOROID:
		case TIDOID:
		case XIDOID:
		case CIDOID:
		case XID8OID:
		case PG_LSNOID:
		case PG_SNAPSHOTOID:
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
		case JSONOID:
		case JSONBOID:
		case JSONPATHOID:
		case TSVECTOROID:
		case TSQUERYOID:
		case UUIDOID:
		case TIMEOID:
		case INETOID:
		case CIDROID:
		case MACADDROID:
		case MACADDR8OID:
		case BITOID:
		case VARBITOID:
			return kNoSettings;
		case FLOAT4OID:
		case FLOAT8OID:
		case POINTOID:
		case LSEGOID:
		case PATHOID:
		case BOXOID:
		case POLYGONOID:
		case LINEOID:
		case CIRCLEOID:
			return kFloatDigits;
		case DATEOID:
		case TIMESTAMPOID:
		case TIMETZOID:
			return kDateStyle;
		case TIMESTAMPTZOID:
			return kDateStyle | kTimeZone;
		case INTERVALOID:
			return kIntervalStyle;
		case MONEYOID:
			return kMonetary;
		case BYTEAOID:
			return kByteaOutput;
		case XMLOID:
			return kXmlOption;
		default:
			return kTextSettings;
	}
}

/* Those of the columns. */
static Settings
SettingsOfRow(Oid type, List **row_types)
{
	TupleDesc desc = lookup_rowtype_tupdesc(type, -1);
	Settings settings = kNoSettings;

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute attribute = TupleDescAttr(desc, i);

		if (!attribute->attisdropped)
			settings |= SettingsOf(attribute->atttypid, row_types);
	}
	ReleaseTupleDesc(desc);
	if (row_types != NULL)
		*row_types = list_append_unique_oid(*row_types, get_typ_typrelid(type));
	return settings;
}

Settings
SettingsOf(Oid type, List **row_types)
{
	Oid base = getBaseType(type);

	switch (get_typtype(base))
	{
		case TYPTYPE_COMPOSITE:
			return SettingsOfRow(base, row_types);
		case TYPTYPE_ENUM:
			return kNoSettings;
		case TYPTYPE_RANGE:
			return SettingsOf(get_range_subtype(base), row_types);
		case TYPTYPE_MULTIRANGE:
			return SettingsOf(get_multirange_range(base), row_types);
		default:
			break;
	}
	Oid element = get_element_type(base);

	return OidIsValid(element) ? kArrayNulls | SettingsOf(element, row_types)
							   : SettingsOfBase(base);
}

/* ---- pinning ---- */

int
SetTextFormat(Settings settings)
{
	int nest_level = 0;

	for (const Pinned &each : pinned)
	{
		if ((each.part_of & settings) == 0 || each.holds())
			continue;
		if (nest_level == 0)
			nest_level = NewGUCNestLevel();
		(void) set_config_option(each.name, each.value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
								 true, 0, false);
	}
	return nest_level;
}

void
ResetTextFormat(int nest_level)
{
	AtEOXact_GUC(true, nest_level);
}

} // namespace mmrepl::change
